"""The fuzz harness: files and command lines of all kinds of nonsense are used, or refused in one sentence.

A trial is a target's name and a seed: ``targets.py`` prepares a folder and a command with them, ``server.py`` runs the
command in a process of its own, ``trial.py`` judges how it ended.
"""
