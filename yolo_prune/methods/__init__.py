"""What changes during training, one file a method. Methods know torch and the channel graph, never a host."""
