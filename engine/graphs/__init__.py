"""Surgery on OpenVINO graphs before they are compiled."""
