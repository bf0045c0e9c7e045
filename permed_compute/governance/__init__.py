"""Who may use what for which purpose: the gate between a model and patients, and the records that it stands on."""
