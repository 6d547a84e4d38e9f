"""What stands in a journal, and what can be told from it? Lines and their values, the core run again, the story."""
