"""The loop: ask, evaluate, tell, refit; recommend a front; record and resume."""
