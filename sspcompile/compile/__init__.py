"""From a toolkit and a scenario's features to a HeadMask: mixture, budget, layout. No weights are touched here."""
