"""What only one stage needs: a package for each."""
