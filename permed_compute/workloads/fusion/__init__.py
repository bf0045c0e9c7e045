"""One model over everything that is known of a patient: images, slides, omics, scores, clinic; whatever is there.

It stands on the three domains and reads what their jobs write; they do not know it.
"""
