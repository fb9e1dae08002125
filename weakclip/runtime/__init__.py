"""How does a process behave? Atomic files, worker pools, the run directory and its lock, rendezvous, signals, logging, errors.

Nothing here knows the method, its config or its tensors.
"""
