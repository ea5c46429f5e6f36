"""Whether the states of the embedded model tell which domain a sentence belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.corpus import DOMAINS
from training.handwritten import training_descriptions, unseen_descriptions
from training.subjects import draw_description

INVERSE_REGULARISATION = 0.1
COMPOSED_PER_DOMAIN = 150


@torch.no_grad()
def pooled_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], layer: int
) -> np.ndarray:
    """Mean over real tokens of the residual stream after `layer` layers, [texts, hidden]."""
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True, return_token_type_ids=False)
    state = model(**inputs, output_hidden_states=True).hidden_states[layer]
    mask = inputs["attention_mask"].unsqueeze(-1)
    return ((state * mask).sum(1) / mask.sum(1)).numpy()


def separability(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int) -> float:
    """AUC of a logistic probe on descriptions not seen in training, mean of one domain against the rest.

    It is fitted on descriptions of the kinds that were: written ones, and composed ones for their wider vocabulary.
    """
    train, unseen = training_descriptions(), unseen_descriptions()
    for domain in DOMAINS:
        rng = Random(f"probe/{domain}")
        train += [(draw_description(domain, rng), domain) for _ in range(COMPOSED_PER_DOMAIN)]
    probe = LogisticRegression(C=INVERSE_REGULARISATION, max_iter=5000)
    probe.fit(pooled_states(model, tokenizer, [text for text, _ in train], layer), [domain for _, domain in train])
    chances = probe.predict_proba(pooled_states(model, tokenizer, [text for text, _ in unseen], layer))
    return float(roc_auc_score([domain for _, domain in unseen], chances, multi_class="ovr", labels=probe.classes_))
