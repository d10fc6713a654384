"""The commands of `gptjax`, a file each."""
