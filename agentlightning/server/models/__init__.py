"""What is sent and answered, by what it is about. Answers are only described here: no model makes one."""
