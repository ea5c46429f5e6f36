"""The Python API in one sitting: plan, build, look, verify, evaluate, export, open again.

python docs/example.py

It needs no download: the model is the small one that ships with the package. Everything is written below the current
folder, to artifacts/ and exported/. It takes less than a minute on two idle cores.
"""

from pathlib import Path

import sspcompile
from sspcompile.errors import OutputExistsError

# What the deployment is asked, a few dozen lines of its log. A quarter of them is held out to judge, the others choose.
prompts = [f"What is {n} plus {2 * n}?" for n in range(1, 17)]
prompts += [f"What is {n} times {n + 1}?" for n in range(1, 17)]

# 1. Before anything is read: what would half of the heads save? Sizes follow from config.json alone.
plan = sspcompile.plan(keep=0.5)
print(f"Heads are {plan.prunable_share:.0%} of the parameters.")
print(f"KV cache per token: {plan.dense.kv_bytes_per_token} -> {plan.sliced.kv_bytes_per_token} bytes")
for verdict in plan.runtimes:
    print(f"  {verdict.runtime}: {'yes' if verdict.loads else 'no'}, {verdict.reason}")

# 2. Build. The settings make it quick: a score of one forward pass, a short continuation of each prompt, one layout.
#    The defaults measure many more masks. The first build of a model also learns its toolkit; later ones reuse it.
settings = {"keep": 0.5, "layout": "per-layer", "criterion": "wanda", "continuation_tokens": 4, "max_tokens": 64}
try:
    artifact = sspcompile.build(None, prompts, out="artifacts/sums", **settings)
except OutputExistsError:
    # Every error has a class, a message and a hint. A finished build is never replaced unasked.
    artifact = sspcompile.load("artifacts/sums")

# 3. What it came to. The report is a value; the figures come from prompts that decided nothing.
report = artifact.report
print(report.title)
print(f"parameters {report.sizes.parameters.dense:,.0f} -> {report.sizes.parameters.sliced:,.0f}")
for row in report.quality:
    print(f"  {row.name}: mean KL {row.mean_kl.value:.2g} nats, {row.top1_agreement.value:.0%} of next tokens the same")

# 4. Which heads stayed: a bool array [layers, heads].
kept = artifact.mask.as_array()
for layer, row in enumerate(kept):
    print(f"  layer {layer}  {''.join('#' if stays else '.' for stays in row)}")

# 5. Is what lies on disk still what was proven? Checksums, and the logits of a fresh load.
parity = artifact.verify().parity
print(f"Largest logit difference to the masked model: {parity.max_difference:.1e}, same text: {parity.same_text}")

# 6. What it costs in answers, on the scenario and off it: 12 questions each, of the dense and of the smaller model.
for suite in artifact.evaluate(items=12):
    match = suite.difference["exact_match"]
    lost = "no answers known" if match is None else f"exact match {match.value:+.2f} against the dense model"
    print(f"  {suite.name}: {suite.prompts} prompts, {lost}")

# 7. Use it. In memory as a transformers model, or in the form that a runtime takes.
small = artifact.load_model()
question = [{"role": "user", "content": "What is 3 plus 6?"}]
inputs = small.tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(small.tokenizer.decode(small.model.generate(**inputs, max_new_tokens=8)[0], skip_special_tokens=True))
exported = artifact.export("onnx", "exported/sums-onnx", overwrite=True)
print(f"{exported}: {sum(file.stat().st_size for file in Path(exported).iterdir()):,} bytes")

# 8. Another day: open the build again, by its folder.
again = sspcompile.load("artifacts/sums")
print(f"{again.path} was built with keep={again.options.keep} and {again.options.criterion}")
