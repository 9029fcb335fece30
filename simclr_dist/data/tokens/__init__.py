"""Texts and proteins as token ids: one folder, written once by `prepare`, mapped into memory by trainings."""
