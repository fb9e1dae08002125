"""How do stages become jobs? Resources, plans, Slurm, this machine, the journal of what was submitted, status."""
