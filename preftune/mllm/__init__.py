"""Models that read images and write text, asked over HTTP: annotators, held-out judges, cleaners of prompts.

config.py has the flags of an endpoint, client.py asks it, questions.py is what it is asked and answers.py what it may answer;
templates/ holds the texts, calls.py keeps what was answered. judge.py is a reward for evaluation, cleaning.py cleans prompts.
"""
