"""What works on this machine, and what a configuration will meet here."""
