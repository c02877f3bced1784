"""The paper's claims in miniature: arms with and without experience, paired over seeds, with intervals."""
