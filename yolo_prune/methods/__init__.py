"""What changes during training, one file or folder a method. Methods know torch and the channel graph, never a host."""
