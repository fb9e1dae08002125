"""How are weights stored? Reading untrusted weight files, checking state dicts, and writing our own weight files.

Nothing here knows a parameter's name; models/sources.py, models/released.py and models/load.py do.
"""
