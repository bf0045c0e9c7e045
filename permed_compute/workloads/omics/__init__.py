"""Multi-omics: genotypes at two bits, from conversion to quality control, scores, association and the register."""
