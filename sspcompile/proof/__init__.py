"""The proof that what was written equals the masked model."""
