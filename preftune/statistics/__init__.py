"""Statistics of scores and images: intervals, paired comparisons, best-of-n, diversity and image statistics."""
