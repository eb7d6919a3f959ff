-- Answers a gRPC request that is too long, after its body has gone by. HAProxy's own answers end the stream at once with
-- RST_STREAM (CANCEL), and gRPC clients in the middle of sending then report CANCELLED and never show the reason.
local LONGEST_BODY = 1024 * 1024 * 1024 -- bytes; a client that sends more is cut off
local PIECE = 1024 * 1024

core.register_service("refuse_long_message", "http", function(applet)
    local left = LONGEST_BODY
    repeat
        local piece = applet:receive(PIECE)
        left = left - #piece
    until #piece == 0 or left < 0
    applet:set_status(200)
    applet:add_header("content-type", "application/grpc")
    applet:add_header("grpc-status", "8") -- RESOURCE_EXHAUSTED
    applet:add_header("grpc-message", "the message is longer than the balancer takes (LB_MAX_MESSAGE_BYTES)")
    applet:start_response()
end)
