"""What token ids of proteins mean: one for each amino acid, for an unknown residue, for one that is hidden."""

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
UNKNOWN, MASK = len(AMINO_ACIDS), len(AMINO_ACIDS) + 1
LETTERS = f"{AMINO_ACIDS}X#"
"""The letter of each id."""
