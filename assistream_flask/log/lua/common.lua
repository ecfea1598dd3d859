-- What the other scripts share: it goes before each of them.
local function last(key)
    local found = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
    if found then
        local epoch, offset = string.match(found[1], '^(%d+)%-(%d+)$')
        return epoch, offset, found[2][3] == 'gone'
    end
end
local function now()
    local time = redis.call('TIME')
    return tonumber(time[1]) * 1000000 + tonumber(time[2])
end
-- What was told is kept for a while beside the stream: who has a run may be gone, and have stored less. The first
-- entry says what it goes on from, and of which runs something is missing before.
local function restart(key, ttl, keep, holes)
    local old, _, gone = last(key)
    if gone then return old end
    local past, told = key .. ':past', {}
    if keep and old then told = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1000) end
    local epoch = now()
    if old and epoch <= tonumber(old) then epoch = tonumber(old) + 1 end
    epoch = string.format('%.0f', epoch)
    redis.call('DEL', key)
    if #told > 0 then
        redis.call('XADD', key, epoch .. '-0', 'e', '', 'from', old, 'holes', holes or '')
        for n = #told, 1, -1 do
            redis.call('XADD', past, 'MAXLEN', '=', 2000, told[n][1], unpack(told[n][2]))
        end
        redis.call('PEXPIRE', past, 60000)
    else
        redis.call('XADD', key, epoch .. '-0', 'e', '')
        redis.call('DEL', past)
    end
    redis.call('PEXPIRE', key, ttl)
    redis.call('PUBLISH', key, epoch .. '-1')
    return epoch
end
