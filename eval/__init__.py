"""Programs that measure and show what a run made; they read folders."""
