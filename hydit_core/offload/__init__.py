"""Networks that are on the device only while they compute."""
