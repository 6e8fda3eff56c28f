"""The lifecycle read back from the log alone: no model, no OpenVINO, no torch."""
