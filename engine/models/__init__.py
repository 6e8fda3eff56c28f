"""From a model's name to a checked folder of OpenVINO IR, and what is known of its family."""
