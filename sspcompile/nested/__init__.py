"""One artifact for several sizes: units in the order of their removal, each smaller model a prefix of the larger."""
