"""What makes the embedded model and the text that goes with it; no part of the installed package."""
