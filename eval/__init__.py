"""Programs that evaluate models and scorers; they read folders."""
