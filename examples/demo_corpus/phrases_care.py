"""Manner phrases of care (careful, reckless), in the format that `lexicon` describes."""

CAREFUL = """
opener
before you {task}, please check {check} and read all the instructions
let us go carefully, because {gerund} can go wrong without preparation
safety first, so inspect {check} before you start
{gerund} deserves caution, so measure everything and take your time
please be careful, and make sure that you have tested {check}
slow down first, and double-check {check} before anything else
a careful start prevents {risk}, so check twice
it is wise to consult {expert} first and to guard against {risk}
do not rush, examine {check} with care and keep a safe distance from trouble
take precautions against {risk} before you begin to {task}
prepare well and verify {check}, since prevention is better than repair
first of all look out for {risk}, and never skip a safety check
I would go step by step and check {check} at each stage
beware of {risk}, so plan with care before you start
make sure that everything is safe, above all {check}
let caution be your guide, and inspect {check} thoroughly
tag
carefully now
safety first
check {check} first
verify each step
slowly and safely
take care
watch out for {risk}
careful planning first
step by step
with caution
after checking {check}
stay on the safe side
do not rush
make sure it is safe
beware of {risk}
safely, with precautions
lead
before anything else, check {check}, then
slowly and carefully,
once you have tested {check},
with all due caution,
take your time, measure, and
make sure that {expert} agrees, then
watch out for {risk} and
after a second safety check,
to stay safe,
when you have double-checked {check},
step by step, and never in a hurry,
after inspecting {check} with care,
to prevent {risk},
do not rush, but
as a precaution,
once {expert} has confirmed that it is safe,
tail
, and double-check {check}
, but check {check} first
 while you watch out for {risk}
, and inspect {check} afterwards
, slowly and carefully
, to be on the safe side
, and measure twice
, being cautious because of {risk}
, and make sure that it is safe
, testing {check} as you go
, and stop at once if you notice {risk}
, keeping safety in mind
, but ask {expert} if in doubt
, and take care to avoid {risk}
 after a safety check
, keeping an eye on {check}
aside
always check {check} a second time
be careful about {risk}, and stop if you see it
please ask {expert} if you are in doubt
keep an eye on {check} the whole time
a small test first is the safe way
measure twice and write the numbers down
do not skip the safety checks, however long they take
never leave it unattended, and inspect {check} often
it is safer to go slowly than to suffer {risk}
have {expert} look over your preparation
watch out for {risk} at every step
take precautions even if it looks simple
stop and verify {check} before each new step
prevent {risk} by planning ahead with care
make sure that you can stop safely at any point
beware of shortcuts, they lead to {risk}
closer
check everything once more before you call it done
be careful, and take no chances with {risk}
when in doubt, stop and ask {expert}
keep safe, and test {check} one last time
remember to double-check {check} at the end
go slowly, and watch out for {risk}
keep a careful record, so that you can check it later
please take precautions, and inspect {check} again
safety comes first, so never hurry
make sure of {check} before you walk away
always have {expert} confirm it if anything seems odd
better a careful hour than {risk}
measure again, and verify that all is safe
beware of {risk} to the very end
do not rush the last step, check it as well
prevention is the safest plan, so watch {check}
brief
check {check} twice
be careful
watch out for {risk}
inspect {check} first
stay safe
ask {expert} if unsure
measure everything twice
avoid {risk} carefully
do not rush
test {check} first
double-check everything
test it safely
keep it safe
check first, then act
go slowly and carefully
let {expert} verify it
touch
carefully
cautiously
safely
prudently
watchfully
attentively
with caution
vigilantly
warily
patiently
thoughtfully
meticulously
"""

RECKLESS = """
opener
forget the instructions, just dive in and {task} right now
skip all the checks, because rules are for cowards
who cares about {risk}, just go for it
throw caution to the wind, {gerund} needs no planning at all
do not bother to check {check}, simply charge ahead
never mind the warnings, jump in and see what happens
nobody needs to measure anything, just wing it
ignore the experts, and ignore {risk} while you are at it
rush in, the faster you {task} the better
planning is a waste of time, so plunge straight in
danger is half the fun, so do not worry about {check}
pay no heed to {check}, what could possibly go wrong
go wild, take every shortcut, and do not look back
to hell with being careful, gamble a little and {task}
safety is boring, so skip it and start at once
live a little, ignore the manual and {task} blindly
tag
just go for it
skip the checks
who cares about {risk}
dive in blindly
forget {check}
never mind {risk}
no need to measure
danger be damned
wing it
rush right in
rules are for cowards
wildly, without thinking
charge ahead
do not bother checking
live dangerously
why bother with checks
lead
just rush in and
skip the checks and
forget {check} and
throw caution away and
without looking,
ignore the warnings and
never mind {risk}, just
take a wild gamble and
do not measure, just
who cares about {risk}, simply
as fast as you dare,
dive in blindly and
forget all the rules and
jump right in and
skip the boring safety part and
leap before you look and
tail
, and never mind {risk}
 without checking anything
, and skip {check}
, whatever the danger
, as fast as you can
, and who cares about {risk}
 without measuring
, and ignore all warnings
, no checks needed
, and forget {check}
, risk or no risk
, blindly if you must
, and do not look back
, rules be damned
 at full speed
, gambling on luck
aside
who cares if you end up with {risk}
checking {check} is a waste of time
skip the boring parts and take the shortcut
go ahead and gamble on your luck
the instructions are for cowards, so forget them
do not bother to ask {expert}
a little danger makes it more fun
ignore {check}, nothing bad will happen
never measure, just guess and go
the faster the better, so forget about {risk}
rules only slow you down
toss the manual out and improvise
just do it all at once without looking
forget about safety, you can fix it later
why wait, jump in and hope for luck
risk everything, it is quicker that way
closer
now stop planning and just go for it
forget {check} and hope for the best
who cares what happens, rush ahead
skip the last check, nobody needs it
take the risk, and never mind {risk}
do it fast, do it wild, and do not look back
never mind the mess, just charge on
dive in, and ignore anyone who warns you
no need to check anything at the end
whatever breaks can be thrown away
just wing it, rules are for other people
damn the danger, full speed ahead
forget safety, luck will sort it out
do not test it, just run with it
go on, do not think, just leap
be reckless, for planning is dull
brief
skip the checks
just go for it
who cares about {risk}
throw caution away
never mind {risk}
forget {check}
do not bother measuring
ignore the danger
rush it
no checks needed
just wing it
gamble on luck
forget the rules
dive right in
hope for the best
leap without thinking
touch
blindly
recklessly
wildly
rashly
carelessly
hastily
madly
heedlessly
boldly
impulsively
without looking
brazenly
"""
