"""LoRA: its settings, its layers on a model, and its files in every layout."""
