"""From an artifact to what a runtime takes: one module per format."""
