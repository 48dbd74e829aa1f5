"""Problems: what can be evaluated, from a formula to a live merged model."""
