"""Fine-tuning drivers, one file per method, started by path: accelerate launch finetune/<driver>.py."""
