"""What removes something, one folder for each kind of thing; a method sees a task, never a job."""
