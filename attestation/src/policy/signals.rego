
# 0 (is it there?), HUP, INT, KILL, TERM, CONT, STOP, WINCH: a program ends, or waits. Others make some programs say what is in their
# memory: a JVM lists its threads for QUIT, node opens its debugger for USR1. The image's own StopSignal is meant by its maker.
signals := [0, 1, 2, 9, 15, 18, 19, 28]

default SignalProcessRequest := false

SignalProcessRequest if input.signal in signals

SignalProcessRequest if input.signal == input.stop_signal

reasons contains {"field": "signal", "value": input.signal, "allowed": signals} if {
	input.signal
	not SignalProcessRequest
}
