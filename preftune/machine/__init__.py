"""What this machine has for the programs, and what is missing."""
