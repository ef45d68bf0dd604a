"""Annotation by people: tasks and answers, studies, who gets what in which order, storage, results and statistics."""
