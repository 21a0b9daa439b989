// The playground of RoPE.
