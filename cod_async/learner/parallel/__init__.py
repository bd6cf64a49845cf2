"""Several ranks as one learner: how they agree, share rows and parameters, and publish weights."""
