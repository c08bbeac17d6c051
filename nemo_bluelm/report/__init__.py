"""What people look at: pictures, pages and tables of what the code computes."""
