"""Training programs (drivers), one file per method, run by path: accelerate launch finetune/<driver>.py."""
