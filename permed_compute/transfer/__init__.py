"""Files in and out: sets of files travel as one signed bundle, through channels behind one port (`transfer.port`)."""
