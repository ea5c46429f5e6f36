"""The part of a vocabulary that a deployment reads and writes: which tokens stay, their files, and the proof."""
