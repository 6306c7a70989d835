"""The only part that touches autograd: taps on the forward, one walk of the graph and one backward."""
