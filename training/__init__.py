"""What makes the embedded model and the text that goes with it; no part of the installed package.

`corpus` generates the text, `train` the weights, `evaluate` the accuracy, `card` the model card, `pools` the domain
pools, `questions` the questions that ship with the model. `make train` runs all of it.
"""
