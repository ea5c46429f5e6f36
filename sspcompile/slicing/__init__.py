"""From a HeadMask to a smaller checkpoint: the plan (headers only), the cut (streamed), the repair, the proof."""
