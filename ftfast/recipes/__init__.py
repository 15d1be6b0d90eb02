"""Methods as declarations: which terms on which batch with which weight. One file each."""
