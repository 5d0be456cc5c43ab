"""What settings there are: a module for each group of conf/."""
