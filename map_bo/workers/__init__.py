"""Workers: who evaluates the rows of a run, in this process or in many."""
