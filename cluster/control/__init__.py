"""The controller's decisions: state and event in, state and effects out."""
